"""The stores that the product builds itself: photos and vectors. They know bytes and numbers, never people."""
