"""Text to token ids and back, behind one interface: `tokenizer.Tokenizer`.

Plain bytes (`bytes`) and SentencePiece models trained on the user's own text (`sentencepiece`) are lossless. Tokenizers
of published models run on the library `tokenizers` (`hugging_face`, `published`), with their chat templates
(`chat_template`). `load` loads any of them, and `export` writes any of them for transformers.
"""
