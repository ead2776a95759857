"""What the page and the command line say of the products of an exported file."""

from spdfq.report.exports import float_products


def test_products_in_float_are_named_unless_these_are_all():
    assert float_products({"float_products": ["head", "blocks.0.attn"], "products": 3}) == "head, blocks.0.attn"
    assert float_products({"float_products": ["head", "blocks.0.attn"], "products": 2}) == "all 2 products"
    assert float_products({"float_products": ["head"], "products": 1}) == "head"
    assert float_products({"float_products": [], "products": 0}) == ""
