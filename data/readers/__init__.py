"""How data sets lie on disk: one function per lay-out, each giving a ``data.source.Source``."""
