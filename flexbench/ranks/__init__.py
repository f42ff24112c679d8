"""Several processes of one job: how they are launched, find each other, and notice a loss."""
