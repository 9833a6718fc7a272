"""The only files that know another library's private or configurable names."""
