from kdcache.report.table import Table

TABLE = Table(["model", "loss"], [["teacher", "1.50"], ["kd", "12.25"]])


def test_text_aligns_names_left_and_numbers_right() -> None:
    assert TABLE.to_text() == "model     loss\n-------  -----\nteacher   1.50\nkd       12.25"


def test_markdown_is_a_table_with_right_aligned_numbers() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "| model   |  loss |",
        "| :------ | ----: |",
        "| teacher |  1.50 |",
        "| kd      | 12.25 |",
    ]


def test_markdown_escapes_the_column_separator() -> None:
    lines = Table(["a|b", "n"], [["x", "1"]]).to_markdown().splitlines()
    assert lines[0] == "| a\\|b |   n |"
    assert lines[2] == "| x    |   1 |"
