"""The version, apart from the package so that what lies below may read it without the rest."""

__version__ = "0.1.0"
