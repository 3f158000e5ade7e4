import time
def test_a(smoke_run):
    print(smoke_run.done.stdout, smoke_run.done.stderr, smoke_run.weights, smoke_run.address)
