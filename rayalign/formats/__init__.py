"""Which records there are: one file a record format, from a raw row to a PreferenceRecord."""
