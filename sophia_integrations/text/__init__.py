"""Text to batches of tokens: sources, formats, tokenizers, a cache.  Never models, trainers or recipes.

    source = load_source(files=["chats/*.jsonl"], task="finetune")     # source.py: two splits of rows
    tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # tokenizer.py; or train_tokenizer(source, …)
    data = prepare(source, tokenizer, block_size=1024, packing=True)   # prepare.py: data.train, data.validation,
    loader = DataLoader(data.train, batch_size=8, collate_fn=data.collate)  # data.collate, data.describe()

Read in this order: ``source.py`` (where text comes from), ``formats.py`` (what a row holds), ``encode.py`` (a row to
tokens and labels), ``blocks.py`` and ``examples.py`` (tokens to data sets), ``prepare.py`` (all of it together).
"""
