"""Pipeline parallelism: schedules, their simulation, and running them."""
