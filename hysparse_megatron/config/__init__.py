"""The configuration: its schema, how it is composed and frozen, and its checks."""
