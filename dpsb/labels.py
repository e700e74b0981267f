"""The public set of labels of a classifier: declared by the user, a schema or the model, never counted in secret."""

from __future__ import annotations

from collections.abc import Sequence

from dpsb.data import USUAL_LABEL, Columns, DataError, Table

MOST_LABELS, LONGEST_LABEL = 1000, 64


def declared_labels(
    spec: str | None, table: Table, columns: Columns, model_labels: Sequence[str] | None
) -> tuple[tuple[str, ...], str]:
    """The public label set and where it was declared.

    Args:
      spec: ``"ham,spam"``; ``"from-data"``, by which the user states that the set of labels in the file is public; or
        ``None`` for the classes that the schema of a data set on the Hub or the model's config declares.

    Raises:
      DataError: If nothing declares the labels, or fewer than two are.
    """
    column = table.pick(columns.label, USUAL_LABEL)
    if spec == "from-data":
        if column is None:
            raise DataError(f"{table.source} has no label column; name it with --label-column.")
        labels, origin = tuple(sorted({*table.labels(column)} - {""})), "from-data"
        if column in table.class_names:
            labels = table.class_names[column]
        if len(labels) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
            raise DataError(
                f"--labels from-data: column {column!r} holds {len(labels)} different values or long ones, which does "
                "not look like a public set of labels; declare the labels."
            )
    elif spec is not None:
        labels, origin = tuple(part.strip() for part in spec.split(",") if part.strip()), "declared"
    elif column in table.class_names and table.names_are_public:
        labels, origin = table.class_names[column], "data set schema"
    elif model_labels and column not in table.class_names:
        labels, origin = tuple(model_labels), "model config"
    else:
        raise DataError(
            "The set of labels must be public: declare it (--labels ham,spam), or state that what the file holds is "
            "public (--labels from-data)."
        )
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise DataError(f"Expected at least two different labels, got {len(labels)} ({origin}).")
    return labels, origin
