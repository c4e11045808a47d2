def plot(out, results, judge):
    pass
