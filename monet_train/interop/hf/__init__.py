"""The modelling files that an exported Hugging Face folder carries, for ``trust_remote_code=True``.

They need torch and transformers (5.0 or newer) and nothing of this package: ``monet_plain.py`` is replaced by
``monet_train/kernels/plain.py`` in an export.
"""
