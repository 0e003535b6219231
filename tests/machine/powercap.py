"""A directory of energy counters as Linux has one for RAPL."""

from __future__ import annotations

from pathlib import Path

RANGE = 262_143_328_850


class Zones:
    """The counters by name. A package or psys is a zone of its own; others are parts of the package before them."""

    def __init__(self, root: Path, microjoules: dict[str, int]) -> None:
        self._paths: dict[str, Path] = {}
        num_zones = num_parts = 0
        zone = root
        for name, value in microjoules.items():
            if name.startswith(("package", "psys")):
                zone, num_parts = root / f"intel-rapl:{num_zones}", 0
                num_zones += 1
                path = zone
            else:
                path = zone / f"{zone.name}:{num_parts}"
                num_parts += 1
            path.mkdir(parents=True)
            (path / "name").write_text(f"{name}\n")
            (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
            self._paths[name] = path / "energy_uj"
            self.set(name, value)

    def set(self, name: str, microjoules: int) -> None:
        self._paths[name].write_text(f"{microjoules}\n")

    def advance(self, name: str, microjoules: int) -> None:
        self.set(name, int(self._paths[name].read_text()) + microjoules)


def write_zones(root: Path, microjoules: dict[str, int]) -> Zones:
    return Zones(root, microjoules)
