"""The report of a run: what its directory holds, as tables and as one page.

files     reads the run's files, which may be unfinished
data      makes the tables; with timeline and samples
store     writes and reads the tables: the data file that a live page shares
charts    geometry; view, what the page says; page, the templates
"""
