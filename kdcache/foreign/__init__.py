"""Caches of other tools read, judged and converted; and any cache compared with a live teacher."""
