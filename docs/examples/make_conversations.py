"""Make up conversations to fine-tune a small model on: questions with short answers in whole sentences.

python docs/examples/make_conversations.py 200 > chat.jsonl
python docs/examples/make_conversations.py 40 --seed 1 > held-out.jsonl
"""

from __future__ import annotations

import argparse
import json
import random

OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("old", "young"), ("fast", "slow"), ("high", "low"), ("light", "dark")),
    *(("wet", "dry"), ("rich", "poor"), ("happy", "sad"), ("open", "closed"), ("hard", "soft"), ("full", "empty")),
    *(("early", "late"), ("loud", "quiet"), ("strong", "weak"), ("near", "far"), ("clean", "dirty"), ("good", "bad")),
)
SOUNDS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "owl": "hoot", "lion": "roar"}
COLOURS = {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "the sky": "blue", "the sun": "yellow"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def opposite(random: random.Random) -> tuple[str, str]:
    word, other = random.sample(random.choice(OPPOSITES), 2)
    question = random.choice(("What is the opposite of {}?", "Tell me the opposite of {}.", "The opposite of {}?"))
    return question.format(word), f"The opposite of {word} is {other}."


def sound(random: random.Random) -> tuple[str, str]:
    animal = random.choice(list(SOUNDS))
    question = random.choice(("What does a {} say?", "Which sound does a {} make?"))
    return question.format(animal), f"A {animal} says {SOUNDS[animal]}."


def colour(random: random.Random) -> tuple[str, str]:
    thing = random.choice(list(COLOURS))
    question = random.choice(("What colour is {}?", "Which colour has {}?"))
    return question.format(thing), f"{thing.capitalize()} is {COLOURS[thing]}."


def day(random: random.Random) -> tuple[str, str]:
    number = random.randrange(7)
    before = random.random() < 0.5
    other = DAYS[(number + (-1 if before else 1)) % 7]
    where = "before" if before else "after"
    return f"Which day comes {where} {DAYS[number]}?", f"The day {where} {DAYS[number]} is {other}."


def conversation(random: random.Random) -> dict[str, list[dict[str, str]]]:
    messages = []
    for make in random.choices((opposite, sound, colour, day), k=random.randint(1, 3)):
        question, answer = make(random)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if random.random() < 0.3:
        goodbye = random.choice(("Thank you!", "Thanks, bye.", "That is all."))
        messages += [
            {"role": "user", "content": goodbye},
            {"role": "assistant", "content": "You are welcome. Goodbye!"},
        ]
    return {"messages": messages}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("count", type=int)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
source = random.Random(options.seed)
for _ in range(options.count):
    print(json.dumps(conversation(source)))
