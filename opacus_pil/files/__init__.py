"""Files and what identifies their contents: containers, fingerprints, hashes, Parquet ledgers."""
