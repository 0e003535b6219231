"""User messages for self-distillation: varied, written by hand or made from small tables.

    themes x patterns  ->  a list of (message, is_factual);  CAPITALS  ->  (message, reply)

Factual messages are answered greedily, and open ones are sampled; see `distil.py`.
"""

from __future__ import annotations

# Answers are given here because a model this small invents capitals. France is left out: it is the test question.
CAPITALS = {
    "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Canada": "Ottawa", "Australia": "Canberra",
    "Brazil": "Brasília", "Argentina": "Buenos Aires", "Mexico": "Mexico City", "India": "New Delhi",
    "Russia": "Moscow", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest",
    "Ireland": "Dublin", "the United Kingdom": "London", "the United States": "Washington, D.C.",
    "Turkey": "Ankara", "Kenya": "Nairobi", "Nigeria": "Abuja", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana",
}  # fmt: skip
CAPITAL_PATTERNS = (
    "What is the capital of {}?",
    "Tell me the capital city of {}.",
)
THINGS = (
    "photosynthesis", "gravity", "the water cycle", "a volcano", "an earthquake", "electricity", "a rainbow",
    "the moon", "the sun", "democracy", "inflation", "recycling", "evolution", "bacteria", "a vaccine",
    "the internet", "a computer", "a black hole", "an atom", "magnetism", "a glacier", "a desert",
    "a rainforest", "the heart", "the brain", "sleep", "friendship", "a poem", "a metaphor",
    "the Renaissance", "a symphony", "a bridge", "an airplane", "a telescope", "a microscope", "a library",
    "a museum", "bread", "cheese", "coffee", "tea", "a bicycle", "a train", "a lighthouse",
)  # fmt: skip
THING_PATTERNS = (
    "What is {}?",
    "Explain {} to a child in two sentences.",
    "Tell me something interesting about {}.",
    "Write one short paragraph about {}.",
)
TASKS = (
    "stay healthy", "sleep better", "learn a new language", "save money", "make new friends",
    "prepare for an exam", "write a good letter", "cook rice", "grow tomatoes", "clean a kitchen",
    "plan a trip", "stay calm under stress", "speak in public", "read more books", "start running",
    "take care of a dog", "organize a desk", "work as a team",
)  # fmt: skip
TASK_PATTERNS = (
    "Give me three tips to {}.",
    "How can I {}?",
    "List five steps to {}.",
)
ITEMS = (
    "fruits", "vegetables", "animals that live in the sea", "colors", "planets", "musical instruments",
    "sports", "trees", "kitchen tools", "professions", "European countries", "things to pack for a trip",
    "kinds of weather", "birds",
)  # fmt: skip
ITEM_PATTERNS = ("Name three {}.", "List five {}.", "Give me a short list of {}.")
CODE = (
    "adds two numbers", "returns the larger of two numbers", "reverses a string",
    "counts the vowels in a string", "checks whether a number is even", "computes a factorial",
    "returns the sum of a list", "finds the longest word in a list", "converts Celsius to Fahrenheit",
    "checks whether a word is a palindrome", "removes duplicates from a list",
    "reads a file and counts its lines", "prints the numbers from 1 to 10", "sorts a list of numbers",
)  # fmt: skip
CODE_PATTERNS = ("Write a Python function that {}.", "Show me Python code that {}.")
OPEN = (
    "Hello!", "Hi", "Hi, how are you?", "Good morning!", "Good evening.", "Hey there", "What can you do?",
    "Who are you?", "What is your name?", "Thank you!", "Thanks, that helped.", "Goodbye!", "See you later.",
    "I am bored.", "I feel sad today.", "I am happy today!", "Can you help me?", "Are you a human?",
    "Tell me a joke.", "Tell me a short story.", "Write a haiku about the sea.",
    "Write a short poem about autumn.", "Write two sentences about the sea.",
    "Write two sentences about a forest.", "Describe a sunny day at the beach.", "Describe a busy market.",
    "Describe your perfect breakfast.", "Write a polite email asking for a day off.",
    "Write a thank-you note to a teacher.", "Suggest a name for a cat.",
    "Suggest a title for a story about a ship.", "What should I cook tonight?",
    "What is a good gift for a friend?", "Which is better, tea or coffee?", "Why is the sky blue?",
    "Why do leaves change color?", "Why do we dream?", "How do birds fly?", "How do fish breathe?",
    "How does a refrigerator work?", "Why is the sea salty?", "Who wrote Romeo and Juliet?",
    "Who painted the Mona Lisa?", "Who was Albert Einstein?", "Who was Isaac Newton?", "Who was Marie Curie?",
    "What is the largest ocean?", "What is the tallest mountain?", "What is the longest river?",
    "How many days are in a week?", "How many months are in a year?", "How many continents are there?",
    "What color is the sky?", "What is the opposite of hot?", "What is the plural of mouse?",
    "What is a noun?", "What is a verb?", "Correct this sentence: she go to school yesterday.",
    "Rewrite politely: give me the report now.",
    "Summarize in one sentence: the ship left the harbor at dawn, met a storm, and came home a week later.",
    "Translate to French: good morning.", "What does the word 'argosy' mean?",
    "What is a mixture of experts?", "What is machine learning?", "What is a neural network?",
    "What is an operating system?", "What is a database?", "What is the speed of light?",
    "What is water made of?", "What is the freezing point of water?", "Give me a fun fact.",
    "Give me a motivational quote.", "Write a sentence with the word 'river'.",
    "Write a dialogue between a cat and a dog.", "Make a plan for a weekend in the mountains.",
    "What are the benefits of exercise?", "What are the four seasons?", "What are the primary colors?",
    "Finish the sentence: once upon a time", "Is it good to drink water?", "Can dogs eat chocolate?",
    "Do plants need sunlight?",
)  # fmt: skip


def user_messages() -> list[tuple[str, bool]]:
    """All messages in a fixed order, each with a flag: whether it has one right answer."""
    found: list[tuple[str, bool]] = []
    for patterns, fillers, is_factual in (
        (THING_PATTERNS, THINGS, False),
        (TASK_PATTERNS, TASKS, False),
        (ITEM_PATTERNS, ITEMS, False),
        (CODE_PATTERNS, CODE, True),
    ):
        found += [(pattern.format(filler), is_factual) for pattern in patterns for filler in fillers]
    found += [(message, True) for message in OPEN] + [(message, False) for message in OPEN]
    return found


def written_replies() -> list[tuple[str, str]]:
    """Messages about capitals, with the replies that we wrote ourselves."""
    return [
        (pattern.format(country), f"The capital of {country} is {capital}".rstrip(".") + ".")
        for pattern in CAPITAL_PATTERNS
        for country, capital in CAPITALS.items()
    ]
