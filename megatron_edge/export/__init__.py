"""Export: from sharded checkpoint to deployable files.

`gather.py` merges the shards of any layout, `compress.py` encodes them into the canonical artifact, `targets/`
converts that artifact for other runtimes. Called by the export job; other stages meet it on disk only.
"""
