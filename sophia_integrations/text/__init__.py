"""Text to rows of tokens: documents, their split, tokenizers, blocks, a cache.  Never models, trainers or recipes.

Read in this order: ``documents.py``, ``tokenizer.py``, ``blocks.py``.
"""
