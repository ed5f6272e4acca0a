"""The built-in tuning strategies. A plain package: vlft finds it only through entry points, as it finds anyone's."""
