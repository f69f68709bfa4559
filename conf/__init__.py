"""The YAML configuration, shipped with the package."""
