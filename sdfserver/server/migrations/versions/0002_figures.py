"""Figures that outlive the jobs they are of, what a worker says of its device, and the request that made a job."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Add a table and two columns."""
    op.create_table(
        "totals",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("labels", sa.String(255), primary_key=True),
        sa.Column("value", sa.Float, nullable=False),
    )
    op.add_column("jobs", sa.Column("request_id", sa.String(64)))
    op.add_column("workers", sa.Column("figures", sa.JSON))
