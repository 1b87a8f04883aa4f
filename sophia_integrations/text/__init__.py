"""Text to batches of tokens: sources, formats, tokenizers, a cache.  Never models, trainers or recipes.

    source = load_source(files=["chats/*.jsonl"], task="finetune")     # source.py: two splits of rows
    tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # tokenizer.py; or train_tokenizer(source, …)
    data = prepare(source, tokenizer, block_size=1024, packing=True)   # prepare.py: data.train, data.validation,
    loader = DataLoader(data.train, batch_size=8, collate_fn=data.collate)  # data.collate, data.describe()

Read in this order: ``raw.py`` (rows as they stand in files), ``rows.py`` (rows of one format, checked and split),
``source.py`` (where they come from), ``encode.py`` (rows to items of tokens and labels), ``tokens.py`` (a table of
items) and ``stream.py`` (a stream of them), ``prepare.py`` (all of it together).  Tables and streams of rows are those
of `datasets`.
"""
