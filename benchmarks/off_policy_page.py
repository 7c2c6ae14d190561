def write(r):
    print(len(r))
