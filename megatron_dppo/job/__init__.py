"""A job's processes: where they run, who starts and watches them, how a cluster gets them."""
