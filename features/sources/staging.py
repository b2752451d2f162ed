"""The SQL behind a mapped import: texts to typed lines, lines to events, and a reason for each row that does not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa
from iso4217 import Currency

from features.sources.mapping import Mapping
from features.sources.mapping_parts import EPOCHS, Condition, MoneyPart, TextPart, TimePart
from features.sources.row_problems import ISO, NEEDS_ITEMS, named, problems, quoted, said_time

EVENT_TEXTS = ("channel", "store_id", "session_id", "offer_id", "campaign_id", "query")
_OFFSET = r"\s?([+-]\d{2}):?(\d{2})$"
"""Hours and minutes from UTC, as some write them: apart, or without their colon."""
_ZONED = r"\d{2}:\d{2}.*(Z|[+-]\d{2}(:?\d{2})?)$"
BLANKS = " \u00a0\u202f"
"""The blank and the two that do not break a line."""
SIGNS = {"EUR": "€", "GBP": "£", "USD": "$", "CAD": "$", "AUD": "$", "JPY": "¥", "CNY": "¥", "INR": "₹", "PLN": "zł", "TRY": "₺"}
"""What stands for a currency beside its code."""
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def create(db: duckdb.DuckDBPyConnection, mapping: Mapping) -> None:
    """Make the empty tables of a stage."""
    fields = ", ".join(f"{name} {kind}" for name, kind in _fields(mapping).items())
    _run(db, f"CREATE TABLE lines (file_no INTEGER, row BIGINT, {fields})")
    _run(
        db,
        """CREATE TABLE rejected (file_no INTEGER, file VARCHAR, row BIGINT, id VARCHAR, field VARCHAR, reason VARCHAR,
           value VARCHAR, raw VARCHAR, rows BIGINT)""",
    )
    _run(db, "CREATE TABLE skipped (because VARCHAR, rows BIGINT)")


def add(db: duckdb.DuckDBPyConnection, mapping: Mapping, number: int, file: str, table: pa.Table, rows: np.ndarray, line: str) -> None:
    """Check and add one batch of a file's rows; *line* is the column that holds a row as it was read, if there is one."""
    db.register("chunk", table.append_column("_u_row", pa.array(rows, pa.int64())))
    raw = named(line) if line in table.column_names else f"to_json({_struct({c: named(c) for c in table.column_names})})::VARCHAR"
    typed = ", ".join(f"{sql} AS {name}" for name, sql in _typed(mapping).items())
    _run(db, f"CREATE OR REPLACE TEMP TABLE typed AS SELECT *, {typed}, {_skip(mapping)} AS _u_skip FROM chunk")
    _run(db, f"CREATE OR REPLACE TEMP TABLE judged AS SELECT *, {_problem(mapping)} AS _u_problem FROM typed")
    fields = ", ".join(_final(mapping).values())
    _run(db, f"INSERT INTO lines SELECT {number}, _u_row, {fields} FROM judged WHERE _u_skip IS NULL AND _u_problem IS NULL")
    _run(
        db,
        f"""INSERT INTO rejected SELECT {number}, {quoted(file)}, _u_row, _u_id, _u_problem.field, _u_problem.reason, _u_problem.value,
                   {raw}, 1
            FROM judged WHERE _u_skip IS NULL AND _u_problem IS NOT NULL""",
    )
    _run(db, "INSERT INTO skipped SELECT _u_skip, count(*) FROM judged WHERE _u_skip IS NOT NULL GROUP BY ALL")
    db.unregister("chunk")


def add_bad(db: duckdb.DuckDBPyConnection, number: int, file: str, bad: Sequence[tuple[int, str, str, str | None]]) -> None:
    """Add the rows that could not be split into fields: row, reason, text, and the id of their event as far as it can be told."""
    for row, reason, raw, event_id in bad:
        db.execute("INSERT INTO rejected VALUES (?, ?, ?, ?, '$', ?, NULL, ?, 1)", [number, file, row, event_id, reason, raw]).fetchall()


def arrange(db: duckdb.DuckDBPyConnection, mapping: Mapping, files: Sequence[str]) -> None:
    """Sort the lines into events: whole or not at all, of one mind about who and when, the same in every file."""
    joined = mapping.event.across_files == "join"
    content = ", ".join(f for f in _fields(mapping) if f not in ("id", "name"))
    _run(
        db,
        f"""CREATE TABLE merged AS SELECT id, name, min(file_no) AS kept_file, count(DISTINCT digest) AS digests,
                sum(rows)::BIGINT AS rows, arg_min(first_row, file_no) AS first_row
            FROM (SELECT id, name, file_no, sum((hash({content}) >> 8)::HUGEINT) AS digest, count(*) AS rows, min(row) AS first_row
                  FROM lines GROUP BY ALL) GROUP BY ALL""",
    )
    agree = [f for f in _fields(mapping) if f in EVENT_TEXTS or f.startswith(("id_", "trait_"))]
    places = dict(zip(agree, (_place(mapping, f) for f in agree), strict=True))
    apart = " ".join(
        f"WHEN min({f}) <> max({f}) THEN {_struct({'field': quoted(places[f]), 'value': f'''min({f}) || ' and ' || max({f})'''})}"
        for f in agree
    )
    _run(
        db,
        f"""CREATE TABLE verdicts AS
            SELECT *, CASE WHEN id IN (SELECT id FROM rejected WHERE id IS NOT NULL) THEN 'held back'
                           WHEN {"false" if joined else "digests > 1"} THEN 'files' WHEN apart IS NOT NULL THEN 'apart'
                           WHEN itemless AND distinct_rows > 1 THEN 'conflict'
                           WHEN name IN ({", ".join(map(quoted, NEEDS_ITEMS))}) AND items = 0 THEN 'no item' END AS verdict
            FROM (SELECT id, name, min(occurred_at) AS occurred_at, count(*) AS kept_rows, count(*) FILTER (is_item) AS items,
                         count(item_id) = 0 AS itemless, count(DISTINCT hash({content})) AS distinct_rows,
                         {f"CASE {apart} END" if agree else "NULL::STRUCT(field VARCHAR, value VARCHAR)"} AS apart
                  FROM lines JOIN merged USING (id, name) {"" if joined else "WHERE file_no = kept_file"} GROUP BY id, name)
            JOIN merged USING (id, name)""",
    )
    _reject_events(db, files)
    _run(
        db,
        """CREATE TABLE heads AS SELECT row_number() OVER (ORDER BY occurred_at, id, name) - 1 AS nth, id, name, occurred_at,
           kept_file, itemless FROM verdicts WHERE verdict IS NULL""",
    )
    _run(
        db,
        f"""CREATE TABLE sorted AS SELECT heads.nth, lines.* FROM lines JOIN heads USING (id, name)
            WHERE (is_item OR itemless) {"" if joined else "AND file_no = kept_file"} ORDER BY heads.nth, file_no, row""",
    )
    _run(db, f"CREATE TABLE tally AS {_tally(mapping)}")
    for table in ("lines", "merged", "verdicts"):
        _run(db, f"DROP TABLE {table}")


def counts(db: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """The counts that ``arrange`` made."""
    cursor = db.execute("SELECT * FROM tally")
    names = [column[0] for column in cursor.description or []]
    [values] = cursor.fetchall()
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def payloads(mapping: Mapping, start: int, end: int) -> str:
    """The query for the events in ``[start, end)``: each as JSON, and when it became known (Unix microseconds)."""
    fields = _fields(mapping)
    event = {
        "event_id": f"{quoted(mapping.source + '-')} || any_value(name) || '-' || any_value(id)",
        "name": "any_value(name)",
        "occurred_at": "strftime(make_timestamp(epoch_us(min(occurred_at))), '%Y-%m-%dT%H:%M:%S.%fZ')",
        "currency": quoted(mapping.shop.currency),
        "identifiers": _struct({kind: f"max(id_{kind})" for kind in mapping.event.identifiers}),
        **{name: f"max({name})" for name in EVENT_TEXTS if name in fields},
        "traits": _struct({trait: f"max(trait_{k})" for k, trait in enumerate(mapping.event.traits)}),
    }
    if mapping.item is not None:
        line = {"item_id": "item_id", "quantity": "quantity", **{f"{m}_minor": m for m in ("amount", "discount", "coupon")}}
        event["items"] = f"list({_struct(line)} ORDER BY file_no, row) FILTER (is_item)"
    parts = ", ".join(f"{quoted(name)}, {sql}" for name, sql in event.items())
    # the patch drops nulls: a field without a value is absent
    return f"""SELECT json_merge_patch('{{}}', json_object({parts}))::VARCHAR, epoch_us(max(known_at)) FROM sorted
               WHERE nth >= {int(start)} AND nth < {int(end)} GROUP BY nth ORDER BY nth"""


def items(mapping: Mapping) -> str:
    """The query for the items sold: of each attribute the most frequent value, of equally frequent ones the first by alphabet."""
    assert mapping.item is not None
    names = list(mapping.item.attributes)
    picked = "".join(
        f""", (SELECT value FROM (SELECT item_id, attr_{n} AS value, count(*) AS times FROM sorted WHERE attr_{n} IS NOT NULL GROUP BY ALL)
             AS votes WHERE votes.item_id = sold.item_id ORDER BY times DESC, value LIMIT 1) AS {named(n)}"""
        for n in names
    )
    told = "".join(f", {_held(mapping, name)} AS {named(name)}" for name in names)
    sold = "(SELECT DISTINCT item_id FROM sorted WHERE is_item) AS sold"
    return f"SELECT item_id{told} FROM (SELECT item_id{picked} FROM {sold}) ORDER BY item_id"


def _held(mapping: Mapping, name: str) -> str:
    """A text attribute as what it holds."""
    part = mapping.attributes()[name]
    if part.holds == "number":
        return f"{_number(mapping, name)}::DOUBLE"
    if part.holds == "list":
        return f"list_filter(list_transform(string_split({named(name)}, {quoted(part.split)}), lambda x: trim(x)), lambda x: x <> '')"
    return named(name)


def _run(db: duckdb.DuckDBPyConnection, query: str) -> None:
    # DuckDB refuses the next query while a result is unread
    db.execute(query).fetchall()


def _struct(fields: dict[str, str]) -> str:
    return "json_object()" if not fields else "{" + ", ".join(f"{quoted(name)}: {sql}" for name, sql in fields.items()) + "}"


def _place(mapping: Mapping, field: str) -> str:
    if field.startswith("id_"):
        return f"event.identifiers.{field.removeprefix('id_')}"
    if field.startswith("trait_"):
        return f"event.traits.{list(mapping.event.traits)[int(field.removeprefix('trait_'))]}"
    return f"event.{field}"


def _fields(mapping: Mapping) -> dict[str, str]:
    """The columns of a line with their types."""
    event = mapping.event
    found = {"id": "VARCHAR", "name": "VARCHAR", "occurred_at": "TIMESTAMPTZ", "known_at": "TIMESTAMPTZ"}
    found |= {name: "VARCHAR" for name in EVENT_TEXTS if getattr(event, name) is not None}
    found |= {f"id_{kind}": "VARCHAR" for kind in event.identifiers}
    found |= {f"trait_{k}": "VARCHAR" for k in range(len(event.traits))}
    found |= {
        "item_id": "VARCHAR",
        "quantity": "BIGINT",
        "amount": "BIGINT",
        "discount": "BIGINT",
        "coupon": "BIGINT",
        "is_item": "BOOLEAN",
    }
    return found | {f"attr_{name}": "VARCHAR" for name in (mapping.item.attributes if mapping.item else ())}


def _typed(mapping: Mapping) -> dict[str, str]:
    """Each field as far as its own column tells it, null where it cannot: ``_u_`` and the field's name."""
    event, item = mapping.event, mapping.item
    refund = _all(mapping, mapping.refunds.when) if mapping.refunds else "false"
    row_digest = "md5(concat_ws(chr(31), " + ", ".join(f"coalesce({named(c)}, chr(30))" for c in mapping.columns()) + "))"
    found = {
        "_u_refund": refund,
        "_u_id": row_digest if event.id is None else _text(mapping.text(event.id)),
        "_u_name": f"CASE WHEN {refund} THEN 'refund' ELSE {_text(mapping.text(event.name))} END",
        "_u_occurred_at": _time(event.occurred_at),
        "_u_known_at": _time(event.known_at.time) if event.known_at.time else "NULL::TIMESTAMPTZ",
        "_u_currency": _text(mapping.text(event.currency)) if event.currency is not None else quoted(mapping.shop.currency),
    }
    found |= {f"_u_{n}": _text(mapping.text(getattr(event, n))) for n in EVENT_TEXTS if getattr(event, n) is not None}
    found |= {f"_u_id_{kind}": _text(mapping.text(text)) for kind, text in event.identifiers.items()}
    found |= {f"_u_trait_{k}": _text(mapping.text(text)) for k, text in enumerate(event.traits.values())}
    if item is not None:
        item_id = _text(mapping.text(item.id))
        left_out = " OR ".join(_condition(mapping, c) for c in item.leave_out) or "false"
        found |= {"_u_item_id": item_id, "_u_is_item": f"({item_id}) IS NOT NULL AND NOT ({left_out})"}
        found |= {f"_u_attr_{n}": _text(mapping.text(text)) for n, text in item.attributes.items()}
        found |= {f"_u_number_{n}": _number(mapping, f"_u_attr_{n}") for n, part in mapping.attributes().items() if part.holds == "number"}
        for measure in ("quantity", "amount", "discount", "coupon"):
            part = getattr(item, measure)
            found[f"_u_{measure}"] = "NULL::DECIMAL(24, 6)" if part is None else _number(mapping, part.column, isinstance(part, MoneyPart))
    return found


def _final(mapping: Mapping) -> dict[str, str]:
    """Each field of a line that has no problem, from its typed columns."""
    item, scale = mapping.item, 10 ** (Currency(mapping.shop.currency).exponent or 0)
    found = {field: f"_u_{field}" for field in _fields(mapping)}
    later = f"_u_occurred_at + INTERVAL {round(mapping.event.known_at.after_hours * 3600)} SECOND"
    found["known_at"] = "_u_known_at" if mapping.event.known_at.time else later
    if item is None:
        return found | dict.fromkeys(("item_id", "quantity", "amount", "discount", "coupon"), "NULL") | {"is_item": "false"}
    # a sold weight is one line of a whole number of pieces, never of none
    found["quantity"] = "CASE WHEN _u_is_item THEN coalesce(ceil(abs(_u_quantity)), 1)::BIGINT END"
    for measure in ("amount", "discount", "coupon"):
        part: MoneyPart | None = getattr(item, measure)
        if part is None:
            found[measure] = "0"
            continue
        units = "coalesce(abs(_u_quantity), 1)" if part.per == "unit" else "1"
        factor = scale if part.unit == "major" else 1
        found[measure] = (
            f"CASE WHEN _u_is_item THEN round(abs(_u_{measure})::DECIMAL(20, 6) * {units}::DECIMAL(12, 3) * {factor})::BIGINT END"
        )
    return found


def _text(text: TextPart) -> str:
    if text.value is not None:
        return quoted(text.value)
    sql = " || '-' || ".join(named(c) for c in text.used)
    if text.is_integer:
        sql = rf"CASE WHEN regexp_matches({sql}, '^\d+(\.0*)?$') THEN regexp_replace({sql}, '\.0*$', '') END"
    if text.values:
        sql = f"CASE {sql} " + " ".join(f"WHEN {quoted(k)} THEN {quoted(v)}" for k, v in text.values.items()) + " END"
    return f"({sql})"


def _time(time: TimePart) -> str:
    raw = said_time(time)
    if time.format in EPOCHS:
        return f"to_timestamp(try_cast({raw} AS DOUBLE) / {EPOCHS[time.format]})"
    zone = "NULL" if time.timezone is None else quoted(time.timezone)
    if time.format is not None:
        parsed = f"try_strptime({raw}, {quoted(time.format)})"
        return parsed if "%z" in time.format else f"{parsed} AT TIME ZONE {zone}"
    zoned = f"regexp_replace({raw}, '{_OFFSET}', '\\1:\\2')"
    return f"""CASE WHEN NOT regexp_matches({raw}, '{ISO}') THEN NULL WHEN regexp_matches({raw}, '{_ZONED}')
               THEN try_cast({zoned} AS TIMESTAMPTZ) ELSE try_cast({raw} AS TIMESTAMP) AT TIME ZONE {zone} END"""


def _number(mapping: Mapping, column: str, is_money: bool = False) -> str:
    """A number as the files write it; of money the shop's own sign or code may stand before or behind it, and no other."""
    sql, tests = named(column), []
    if is_money:
        signs = mapping.shop.currency + SIGNS.get(mapping.shop.currency, "") + BLANKS
        sql = f"trim({sql}, {quoted(signs)})"
    if mapping.files.thousands == " ":
        sql = f"translate({sql}, {quoted(BLANKS)}, {quoted(' ' * len(BLANKS))})"
    if mapping.files.thousands:
        # in groups of three: or a decimal sign would be taken for a divider of thousands
        point, comma = re.escape(mapping.files.decimal), re.escape(mapping.files.thousands)
        grouped = quoted(rf"^[+-]?(\d+|\d{{1,3}}({comma}\d{{3}})+)({point}\d*)?$")
        tests.append(f"regexp_matches({sql}, {grouped})")
        sql = f"replace({sql}, {quoted(mapping.files.thousands)}, '')"
    if mapping.files.decimal != ".":
        sql = f"replace({sql}, {quoted(mapping.files.decimal)}, '.')"
    tests.append(f"regexp_matches({sql}, '{_NUMBER}')")
    return f"CASE WHEN {' AND '.join(tests)} THEN try_cast({sql} AS DECIMAL(24, 6)) END"


def _condition(mapping: Mapping, condition: Condition) -> str:
    column = named(condition.column)
    tests = []
    if condition.matches is not None:
        tests.append(f"regexp_matches({column}, {quoted(condition.matches)})")
    if condition.one_of:
        tests.append(f"{column} IN ({', '.join(map(quoted, condition.one_of))})")
    if condition.below is not None:
        tests.append(f"({_number(mapping, condition.column)}) < {condition.below}")
    if condition.above is not None:
        tests.append(f"({_number(mapping, condition.column)}) > {condition.above}")
    if condition.empty is not None:
        tests.append(f"({column} IS NULL) = {condition.empty}")
    held = f"coalesce({' AND '.join(tests)}, false)"
    return f"NOT {held}" if condition.negate else held


def _all(mapping: Mapping, conditions: Sequence[Condition]) -> str:
    return " AND ".join(f"({_condition(mapping, c)})" for c in conditions)


def _skip(mapping: Mapping) -> str:
    cases = " ".join(f"WHEN {_all(mapping, skip.when)} THEN {quoted(skip.because)}" for skip in mapping.skip)
    return f"CASE {cases} END" if cases else "NULL::VARCHAR"


def _problem(mapping: Mapping) -> str:
    """The first thing that is wrong with a row: field, reason and value, or null."""
    cases = " ".join(
        f"WHEN {wrong} THEN {_struct({'field': quoted(field), 'reason': quoted(reason), 'value': f'({value})::VARCHAR'})}"
        for field, wrong, reason, value in problems(mapping)
    )
    return f"CASE {cases} END"


def _reject_events(db: duckdb.DuckDBPyConnection, files: Sequence[str]) -> None:
    """Letters for events that are rejected as a whole."""
    names = "[" + ", ".join(map(quoted, files)) + "]"
    _run(
        db,
        f"""INSERT INTO rejected
            SELECT kept_file, {names}[kept_file + 1], first_row, id, CASE verdict WHEN 'apart' THEN apart.field ELSE 'event.id' END,
                CASE verdict WHEN 'apart' THEN 'the rows of one event disagree'
                             WHEN 'files' THEN 'stands in two files with different content: export it once, or set event.across_files: join'
                             ELSE 'stands on several rows with different content: give each event an id of its own' END,
                CASE verdict WHEN 'apart' THEN id || ': ' || apart.value ELSE id END,
                (SELECT to_json(list(lines))::VARCHAR FROM lines WHERE lines.id = verdicts.id AND lines.name = verdicts.name), rows
            FROM verdicts WHERE verdict IN ('apart', 'files', 'conflict')""",
    )
    _run(
        db,
        """INSERT INTO skipped SELECT 'no item is left of the event', sum(rows) FROM verdicts
           WHERE verdict = 'no item' HAVING count(*) > 0""",
    )


def _tally(mapping: Mapping) -> str:
    """Where each row went."""
    identified = " OR ".join(f"id_{kind} IS NOT NULL" for kind in mapping.event.identifiers) or "false"
    return f"""
        SELECT (SELECT coalesce(sum(rows), 0) FROM verdicts WHERE verdict IS DISTINCT FROM 'no item'
                    AND (verdict IS NULL OR verdict = 'held back')) + (SELECT coalesce(sum(rows), 0) FROM rejected)
                    + (SELECT coalesce(sum(rows), 0) FROM skipped) AS rows,
               (SELECT count(*) FROM heads) AS events,
               (SELECT coalesce(sum(CASE WHEN itemless THEN 1 ELSE items END), 0) FROM verdicts WHERE verdict IS NULL) AS taken,
               (SELECT coalesce(sum(CASE WHEN itemless THEN 0 ELSE kept_rows - items END), 0)
                    FROM verdicts WHERE verdict IS NULL) AS left_out,
               (SELECT coalesce(sum(rows - kept_rows + CASE WHEN itemless THEN kept_rows - 1 ELSE 0 END), 0)
                    FROM verdicts WHERE verdict IS NULL) AS repeated,
               (SELECT coalesce(sum(rows), 0) FROM rejected) AS rejected,
               (SELECT coalesce(sum(rows), 0) FROM verdicts WHERE verdict = 'held back') AS held_back,
               (SELECT count(DISTINCT nth) - count(DISTINCT nth) FILTER ({identified}) FROM sorted) AS anonymous
    """
