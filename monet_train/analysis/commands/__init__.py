"""The commands of ``monet-experts``: a module for each, with its options and what it prints."""
