"""Other methods of sharing out a cache budget, as policies to compare PrefixKV with."""
