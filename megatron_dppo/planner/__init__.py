"""What a config needs, before anything is allocated: rules, bytes of every rank, wire bytes, seconds of a step.

Pure functions of numbers: no process group, no model, no GPU. `plan.make_plan` is the entry; `docs/planner.md` says how
to read what it gives, and how far it can be trusted.
"""
