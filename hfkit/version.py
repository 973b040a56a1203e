"""The version of hfkit, which a build reads here."""

__version__ = "0.1.0"
