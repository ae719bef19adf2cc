"""The decay itself, which knows no framework. Adapters are the only users of this package."""
