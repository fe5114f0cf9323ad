"""A Feast source and offline store that are not files: tables in memory, as a warehouse would be."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, ClassVar, Literal

import pandas as pd
import pyarrow as pa
from feast.data_source import DataSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob
from feast.protos.feast.core.DataSource_pb2 import DataSource as DataSourceProto
from feast.repo_config import FeastConfigBaseModel
from feast.value_type import ValueType

TABLES: dict[str, pd.DataFrame] = {}


class TableSource(DataSource):
    """The table ``TABLES[name]``."""

    def source_type(self) -> Any:
        return DataSourceProto.CUSTOM_SOURCE

    @staticmethod
    def from_proto(data_source: Any) -> TableSource:
        return TableSource(
            name=data_source.name,
            timestamp_field=data_source.timestamp_field,
            created_timestamp_column=data_source.created_timestamp_column,
            field_mapping=dict(data_source.field_mapping),
        )

    def _to_proto_impl(self) -> Any:
        proto = DataSourceProto(
            name=self.name,
            type=DataSourceProto.CUSTOM_SOURCE,
            data_source_class_type="tests.support.table_source.TableSource",
            custom_options=DataSourceProto.CustomSourceOptions(configuration=json.dumps({}).encode()),
            field_mapping=self.field_mapping,
        )
        proto.timestamp_field = self.timestamp_field
        proto.created_timestamp_column = self.created_timestamp_column or ""
        return proto

    def validate(self, config: Any) -> None:
        pass

    def get_table_column_names_and_types(self, config: Any) -> Any:
        return [(name, str(kind)) for name, kind in TABLES[self.name].dtypes.items()]

    @staticmethod
    def source_datatype_to_feast_value_type() -> Any:
        return lambda _: ValueType.DOUBLE

    def get_table_query_string(self) -> str:
        return self.name


class TableOfflineStoreConfig(FeastConfigBaseModel):
    type: Literal["tests.support.table_source.TableOfflineStore"] = (
        "tests.support.table_source.TableOfflineStore"
    )


class TableJob(RetrievalJob):
    full_feature_names: ClassVar[bool] = False
    on_demand_feature_views: ClassVar[list[Any]] = []
    metadata: ClassVar[None] = None

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._frame

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return pa.Table.from_pandas(self._frame, preserve_index=False)


class TableOfflineStore(OfflineStore):
    """Only what materialization asks of an offline store."""

    pulled: ClassVar[list[tuple[datetime, datetime]]] = []

    @staticmethod
    def pull_latest_from_table_or_query(
        config: Any,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        TableOfflineStore.pulled.append((start_date, end_date))
        frame = TABLES[data_source.name]
        frame = frame[frame[timestamp_field].between(start_date, end_date)]
        order = [timestamp_field, *([created_timestamp_column] if created_timestamp_column else [])]
        newest = frame.sort_values(order).groupby(join_key_columns).tail(1)
        return TableJob(newest[[*join_key_columns, *feature_name_columns, *order]])
