"""The one exception for a user's mistake: the command line prints it as a single line, without a traceback."""


class CrispError(Exception):
    """A mistake that the user can mend.

    The message is one line: the value, the cause and the remedy, e.g.
    ``/data/shards: no manifest.json; write shards with 'crisp shard SOURCE OUT'``.
    """
