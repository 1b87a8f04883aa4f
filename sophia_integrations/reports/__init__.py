"""Reports: read run folders and draw or compare them.  Never trains, never imports the training code."""
