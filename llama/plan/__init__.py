"""What a cluster will do with a configuration, before it is asked."""
