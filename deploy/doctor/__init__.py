"""`distrl doctor`: says before a run what it lacks, and of a hung one who waits for whom.

before      the checks of a config on this machine
hung        what a run waits for, and the stack of the process that it waits for
processes   finds a run's processes on this machine
"""
