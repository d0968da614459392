"""From parquet shards to packed rows of token ids (SPEC 8, 9): shards, order, packing, lanes, loader, ingest."""
