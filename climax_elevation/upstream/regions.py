"""Regions for a data module that has none, as ClimaX's regional forecasting has them."""

from __future__ import annotations

from typing import Any

from climax_elevation.errors import InputError


def with_regions(reader: type[Any], regions: Any) -> type[Any]:
    """A data module for regional forecasting, made of one for global forecasting.

    Args:
        reader: The one for global forecasting.
        regions: ClimaX's `utils.data_utils`, with `BOUNDARIES` and `get_region_info`.

    Returns:
        The class; its batches end with the region, as ClimaX's do, and its script calls `set_patch_size`.
    """

    class RegionalForecastDataModule(reader):
        """The plugin's data module for regional forecasting, with the names of ClimaX's constructor."""

        def __init__(
            self,
            root_dir: str,
            variables: list[str],
            buffer_size: int,
            out_variables: list[str] | str | None = None,
            region: str = "NorthAmerica",
            predict_range: int = 6,
            hrs_each_step: int = 1,
            batch_size: int = 64,
            num_workers: int = 0,
            pin_memory: bool = False,
        ) -> None:
            if region not in regions.BOUNDARIES:
                raise InputError(f"unknown data.region {region!r}; available: {', '.join(regions.BOUNDARIES)}")
            super().__init__(
                root_dir,
                variables,
                buffer_size,
                out_variables,
                predict_range,
                hrs_each_step,
                batch_size,
                num_workers,
                pin_memory,
            )
            self._patch_size = 1

        def set_patch_size(self, p: int) -> None:
            self._patch_size = p

        def _beside(self) -> tuple[Any, ...]:
            return (regions.get_region_info(self.hparams.region, *self.get_lat_lon(), self._patch_size),)

    return RegionalForecastDataModule
