"""Whose windowed features are to be computed: kept beside the queue, so that whoever ends in between leaves them to others."""

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "to_compute",
        sa.Column("customer_id", sa.Text(collation="C"), primary_key=True, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
        schema="ubiquo_inbox",
    )
