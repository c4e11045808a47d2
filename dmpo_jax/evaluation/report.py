def write_report(out, result, rows, open_image, *, single_file=False):
    return out / "report" / "index.html"
