"""Whole numbers on the command line."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Returns an argparse type: whole numbers from `least` up."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is below {least}")
        return number

    parse.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
    return parse
