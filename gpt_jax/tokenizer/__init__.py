"""Text to token ids and back, behind one interface: `tokenizer.Tokenizer`.

Plain bytes (`bytes`) and SentencePiece models trained on the user's own text (`sentencepiece`) keep every text as it
is. Those of published models are put into the terms of the library `tokenizers` (`hugging_face`, `published`), with
their chat templates (`chat_template`). `load` knows them all; `export` writes any of them for transformers.
"""
