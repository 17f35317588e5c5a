"""The command line: ``fastattn doctor`` and ``fastattn demo``."""
