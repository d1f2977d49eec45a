"""The small model: made here, from nothing, where no weights can be downloaded.

apprentices play -> transcripts -> tokenizer + Qwen3 configuration -> warm start -> Hugging Face directory
"""
