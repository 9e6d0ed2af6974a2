"""Exit statuses of the command line and of the job files."""

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended
