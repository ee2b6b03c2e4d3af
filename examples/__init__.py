import plumbing.interrupts  # noqa: F401  before the slow imports of these programs
