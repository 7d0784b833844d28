"""Speaks as `vllm_worker` does, without vLLM: code i of every picture is (seed + i) % 64. Seed 66 kills it.

It takes a moment over seeds 66 and 200 to 299. Seeds from 1000 on are never ready. Class 2 is refused.
"""

import os
import sys
import threading
import time
from multiprocessing.connection import Connection

line = Connection(int(sys.argv[1]))
folder, settings = line.recv()
if "refuse" in os.environ.get("STAND_IN", ""):
    line.send(("refused", 0, "a model that does not fit"))
    sys.exit()
line.send(("ready", 0, None))
stopped, lock = set(), threading.Lock()


def draw(number, what):
    seed = what["settings"]["seed"]
    if seed == 66:
        time.sleep(0.2)
        os._exit(9)
    if 200 <= seed < 300:
        time.sleep(0.4)
    codes = [(seed + i) % 64 for i in range(16)]
    for count in (1, 8) if seed >= 1000 else (1, 8, 16):
        with lock:
            line.send(("codes", number, codes[:count]))


while True:
    try:
        kind, number, what = line.recv()
    except EOFError:
        break
    if kind == "quit":
        break
    if kind == "draw" and what["subject"] == 2:
        with lock:
            line.send(("failed", number, "ValueError: by the stand-in"))
    elif kind == "draw":
        threading.Thread(target=draw, args=(number, what), daemon=True).start()
    else:
        with open(os.path.join(folder, "stopped"), "a") as file:
            file.write("x")
