"""Blocks are free, held or kept; kept blocks are found by their whole content, and are evicted fairly."""

from __future__ import annotations

import pytest

from argosy.engine.prefix import PrefixCache
from argosy.kept.kv_cache import BlockContent, KvBlocks
from tests.engine.scheduling import NotedTokens


def content(number: int, tenant: str = "") -> BlockContent:
    return BlockContent(bytes([number]), bytes([number - 1]), bytes([number]) * 64, tenant)


def keep(blocks: KvBlocks, *contents: BlockContent) -> None:
    """Take a block for each content, keep it under that content, and give it back."""
    for one in contents:
        held = blocks.take(1)
        blocks.keep(held[0], one)
        blocks.give_back(held)


def found(blocks: KvBlocks, *contents: BlockContent) -> list[bool]:
    return [blocks.find(one) is not None for one in contents]


def test_a_block_is_found_only_if_every_part_of_its_content_is_the_same() -> None:
    blocks = KvBlocks(4, 16)
    keep(blocks, content(1))
    assert found(blocks, content(1)) == [True]
    for part, other in (("tokens", bytes(64)), ("parent", b"x"), ("tenant", "other"), ("key", b"x")):
        assert found(blocks, content(1)._replace(**{part: other})) == [False]


def test_when_free_blocks_run_out_the_least_recently_used_kept_blocks_are_taken() -> None:
    gone: list[bytes] = []
    blocks = KvBlocks(4, 16, forgotten=gone.append)
    keep(blocks, content(1), content(2), content(3))
    assert (blocks.num_free, blocks.num_kept, blocks.num_held, blocks.num_available) == (1, 3, 0, 4)
    used = [blocks.find(content(1))]
    blocks.hold(used)  # type: ignore[arg-type]
    blocks.give_back(used)  # type: ignore[arg-type]
    held = blocks.take(2)
    assert found(blocks, content(1), content(2), content(3)) == [True, False, True]
    held += blocks.take(2)
    assert gone == [content(2).key, content(3).key, content(1).key]
    assert sorted(held) == [0, 1, 2, 3]
    assert blocks.num_available == 0


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    blocks = KvBlocks(3, 16)
    held = blocks.take(3)
    for number, block in enumerate(held, start=1):
        blocks.keep(block, content(number))
    blocks.give_back(held)
    blocks.take(2)
    assert found(blocks, content(1), content(2), content(3)) == [True, False, False]


def test_a_flood_from_one_tenant_does_not_evict_the_blocks_of_another() -> None:
    blocks = KvBlocks(8, 16)
    keep(blocks, content(1, "quiet"), content(2, "quiet"))
    for number in range(10, 40):
        keep(blocks, content(number, "flood"))
    assert found(blocks, content(1, "quiet"), content(2, "quiet")) == [True, True]
    assert found(blocks, *(content(number, "flood") for number in range(33, 40))) == [False] + [True] * 6


def test_a_block_is_free_again_when_its_last_holder_gives_it_back() -> None:
    blocks = KvBlocks(2, 16)
    first = blocks.take(1)
    blocks.keep(first[0], content(1))
    second = list(first)
    blocks.hold(second)
    blocks.give_back(first)
    assert (blocks.num_held, blocks.num_kept) == (1, 0)
    blocks.give_back(second)
    assert (blocks.num_held, blocks.num_kept) == (0, 1)
    assert first == second == []
    with pytest.raises(AssertionError):
        blocks.take(3)


def test_of_two_blocks_with_the_same_content_the_first_is_found_and_the_second_becomes_free() -> None:
    blocks = KvBlocks(3, 16)
    first, second = blocks.take(1), blocks.take(1)
    for block in (*first, *second):
        blocks.keep(block, content(1))
    assert blocks.find(content(1)) == first[0]
    blocks.give_back(second)
    assert (blocks.num_free, blocks.num_kept) == (2, 0)


def test_forgotten_blocks_of_a_tenant_are_not_found_even_while_held() -> None:
    blocks = KvBlocks(4, 16)
    keep(blocks, content(1, "a"), content(2, "b"))
    held = blocks.take(1)
    blocks.keep(held[0], content(3, "a"))
    blocks.forget("a")
    assert found(blocks, content(1, "a"), content(2, "b"), content(3, "a")) == [False, True, False]
    blocks.give_back(held)
    assert (blocks.num_free, blocks.num_kept) == (3, 1)


def test_keys_depend_on_the_tenant_the_model_and_the_secret() -> None:
    class Tokens:
        def tokens_from(self, start: int, count: int) -> list[int]:
            return list(range(start, start + count))

        def marks_from(self, start: int, count: int) -> bytes:
            return b""

    def keys(secret: int, identity: int, tenant: str) -> list[bytes]:
        blocks = KvBlocks(4, 16)
        cache = PrefixCache(blocks, NotedTokens(4), secret=bytes([secret]) * 32, identity=bytes([identity]))
        return [one.key for one in cache.chain(tenant).contents(Tokens(), 3)]

    assert keys(1, 1, "a") == keys(1, 1, "a")
    made = [key for facts in ((1, 1, "a"), (1, 1, "b"), (1, 2, "a"), (2, 1, "a")) for key in keys(*facts)]
    assert len(set(made)) == 4 * 3
