"""Where pushed rows go: the views that a push source feeds, and the batch source behind them.

What ``POST /push`` and the stream consumer share beside ``core.feature_rows``. Feast and Arrow are imported
with the first rows for the offline store. Knows no HTTP and no stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import InvalidRequest, InvalidRow, InvalidSource, PushSourceNotFound
from core.feature_rows import CheckedRows
from core.repository import Definitions, FeastRepository, View
from core.types import Dtype

if TYPE_CHECKING:
    import pyarrow as pa


def fed_views(definitions: Definitions, source: str) -> list[View]:
    """The views that the push source feeds.

    Raises:
        PushSourceNotFound: it feeds none.
    """
    fed = [view for view in definitions.views.values() if view.source and view.source.push]
    views = [view for view in fed if view.source and view.source.push == source]
    if not views:
        known = ", ".join(sorted({view.source.push for view in fed if view.source and view.source.push}))
        raise PushSourceNotFound(
            f"No feature view takes pushes from {source!r}.",
            hint=f"Push sources: {known or 'none'}.",
            field="push_source_name",
        )
    return views


_PLAIN = frozenset(
    (
        *(Dtype.STRING, Dtype.BYTES, Dtype.BOOL, Dtype.INT32, Dtype.INT64),
        *(Dtype.FLOAT, Dtype.DOUBLE, Dtype.UNIX_TIMESTAMP),
    )
)


@dataclass(frozen=True, slots=True)
class OfflineTarget:
    """A batch source that pushed rows are appended to.

    ``view`` is one of the views on it, ``feature_view`` Feast's object for it. ``columns`` are the source's
    columns in their order, with their Arrow types where Feast can name them.
    """

    view: str
    feature_view: Any
    columns: Mapping[str, pa.DataType | None]


def offline_targets(repository: FeastRepository, views: Sequence[View]) -> list[OfflineTarget]:
    """One target per batch source: views that share one must not append the rows twice.

    Raises:
        InvalidSource: a batch source cannot be read.
    """
    store = repository.store()
    provider = store._get_provider()
    targets: list[OfflineTarget] = []
    for view in views:
        feature_view = store.registry.get_any_feature_view(view.name, store.project, allow_cache=False)
        source = feature_view.batch_source
        if any(source == known.feature_view.batch_source for known in targets):
            continue
        try:
            described = provider.get_table_column_names_and_types_from_data_source(store.config, source)
            columns = {name: _arrow_type(source, text) for name, text in described}
        except OSError as exc:
            raise InvalidSource(
                f"The batch source of view {view.name!r} cannot be read: {exc}",
                hint="Pushed rows are appended to it, so it must exist.",
            ) from exc
        targets.append(OfflineTarget(view.name, feature_view, columns))
    return targets


def offline_rows(target: OfflineTarget, checked: Sequence[CheckedRows], given: Mapping[str, Any]) -> pa.Table:
    """The rows as the target takes them: the columns as they were sent, typed where a view types them.

    Args:
        target: where they go.
        checked: the rows, checked against each view that they are pushed to.
        given: the columns of JSON values that were checked.

    Raises:
        InvalidRow: the columns are not those of the target, or a value is not of its column's type.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = checked[0].rows
    for name, column in given.items():
        if not isinstance(column, list) or len(column) != rows:
            raise InvalidRow(
                f"Column `{name}` is not a list of {rows} values.",
                hint="Send as many values in every column.",
                field=name,
            )
    columns: dict[str, Any] = dict(given)
    for part in checked:
        complex_ = {feature.name for feature in part.view.features if feature.dtype not in _PLAIN}
        for name, values in part.columns.items():
            kept = [_storable(value) for value in values] if name in complex_ else values
            columns[part.names[name]] = kept
        source = part.view.source
        times = {} if source is None else {source.timestamp: part.event_ns}
        if source is not None and source.created is not None and part.created_ns is not None:
            times[source.created] = part.created_ns
        for name, nanoseconds in times.items():
            micros = pa.array([ns // 1000 for ns in nanoseconds], pa.int64())
            columns[part.names.get(name, name)] = micros.cast(pa.timestamp("us", tz="UTC"))
    _require_columns(target, columns)
    arrays = []
    for name, wanted in target.columns.items():
        try:
            column = columns[name]
            array = pa.array(column, from_pandas=True) if isinstance(column, list) else column
            if wanted is not None and array.type != wanted:
                array = pc.cast(array, options=pc.CastOptions(target_type=wanted, allow_time_truncate=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as exc:
            raise InvalidRow(
                f"Column `{name}` does not convert to its type in the batch source of view {target.view!r}.",
                hint="Compare the values with the source" + (f": {wanted}." if wanted is not None else "."),
                field=name,
                view=target.view,
            ) from exc
        arrays.append(array)
    return pa.table(arrays, names=list(target.columns))


def append_offline(repository: FeastRepository, target: OfflineTarget, rows: pa.Table) -> None:
    """Append rows that ``offline_rows`` made, through Feast's offline store.

    Raises:
        InvalidRequest: the offline store takes no rows.
    """
    try:
        repository.store()._get_provider().ingest_df_to_offline_store(target.feature_view, rows)
    except NotImplementedError as exc:
        raise InvalidRequest(
            "The offline store of this repository takes no pushes.",
            hint='Push to "online" and write the batch source upstream.',
            field="to",
        ) from exc


def _arrow_type(source: Any, text: str) -> pa.DataType | None:
    """The Arrow type of a source's column by Feast's mapping; None for a type that has no single one."""
    from feast.type_map import feast_value_type_to_pa

    try:
        found = source.source_datatype_to_feast_value_type()(text)
    except (KeyError, ValueError, AttributeError, NotImplementedError):
        return None
    plain = found.value in _PLAIN  # Dtype has Feast's numbers
    return feast_value_type_to_pa(found, timestamp_unit="us") if plain else None


def _require_columns(target: OfflineTarget, given: Mapping[str, Any]) -> None:
    missing = sorted(set(target.columns) - set(given))
    extra = sorted(set(given) - set(target.columns))
    if missing or extra:
        raise InvalidRow(
            f"The columns are not those of the batch source of view {target.view!r}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(extra)}" if extra else "")
            + ".",
            hint="A push to the offline store appends rows to the source, so it has to bring its columns.",
            field=(missing or extra)[0],
            view=target.view,
        )


def _storable(value: Any) -> Any:
    """A value as a batch source can hold it: no sets, no UUIDs."""
    if isinstance(value, list | set):
        return [_storable(element) for element in value]
    return str(value) if type(value).__name__ == "UUID" else value
