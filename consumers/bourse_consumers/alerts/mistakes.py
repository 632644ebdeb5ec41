"""The texts about mistakes in rules, tables and lists, in English and in Persian."""

from __future__ import annotations

from typing import Any

__all__ = ["WRITE", "explain"]

WRITE = {"en": "write", "fa": "بنویسید"}
KINDS = {
    "number": ("a number", "یک عدد"),
    "truth": ("a condition", "یک شرط"),
    "time": ("a duration such as 5m", "یک مدت مانند 5m"),
    "state": ("a feed state", "یک وضعیت داده"),
}
TEXTS = {
    # expressions
    "empty": ("the expression is empty", "عبارت خالی است"),
    "too_long": ("the expression is too long: at most {most} characters and parts", "عبارت بیش از حد بلند است"),
    "too_deep": ("the expression is nested too deeply", "پرانتزهای عبارت بیش از حد تودرتوست"),
    "too_large": ("the number is too large", "عدد بیش از حد بزرگ است"),
    "not_an_expression": ("this is not an expression: {why}", "این یک عبارت درست نیست: {why}"),
    "kind": ("{wanted} is expected here, not {found}", "اینجا باید {wanted} باشد، نه {found}"),
    "compared": ("{left} is compared with {right}", "{left} با {right} مقایسه شده است"),
    "no_order": ("feed states have no order: use ==, != or in", "وضعیت‌های داده ترتیب ندارند: از ==، != یا in استفاده کنید"),
    "not_part": ("{what} is not part of these expressions", "{what} بخشی از این زبان نیست"),
    "unknown_name": ("no column is called {name!r}; there are {known}", "ستونی به نام {name!r} نیست؛ ستون‌ها: {known}"),
    "unknown_function": ("no function is called {name!r}; there are {known}", "تابعی به نام {name!r} نیست؛ تابع‌ها: {known}"),
    "not_sent": ("the exchange's service does not send {name!r}", "سرویس بورس دادهٔ {name!r} را نمی‌فرستد"),
    "brackets": ("{name} is a function: give its values in brackets", "{name} تابع است: مقدارهایش را در پرانتز بنویسید"),
    "no_brackets": ("{name} takes no brackets", "{name} پرانتز ندارد"),
    "arguments": ("{name}() takes {count} value(s), not {given}", "تابع {name} به {count} مقدار نیاز دارد، نه {given}"),
    "window": ("a fixed duration is expected here, such as 5m", "اینجا باید یک مدت ثابت باشد، مانند 5m"),
    "step": ("a fixed number above 0 is expected here", "اینجا باید یک عدد ثابت بزرگ‌تر از صفر باشد"),
    "table_in_past": ("a table's column ({name}) cannot be part of what is looked back at, nor of a market rule",
                      "ستون جدول ({name}) نمی‌تواند در مقدارهای گذشته یا قاعدهٔ بازار بیاید"),
    "of_one_instrument": ("{name} is of one instrument: in a market rule put it in count(), share() or total()",
                          "{name} مربوط به یک نماد است: در قاعدهٔ بازار آن را در count، share یا total بگذارید"),
    "market_only": ("{name}() is for rules with `scope: market`, and not within another",
                    "{name} فقط برای قاعده‌های با scope: market است و درون تابع مشابه نمی‌آید"),
    "not_for_feed": ("{name}() is not for rules with `scope: feed`", "{name} برای قاعده‌های با scope: feed نیست"),
    # keys and values
    "mapping": ("{what}: keys and values are expected here", "{what}: اینجا باید کلید و مقدار باشد"),
    "unknown_key": ("{what} has no key {name!r}; there are {known}", "{what} کلید {name!r} ندارد؛ کلیدها: {known}"),
    "comma": ("within {{ }} an expression with a comma needs quotes", "درون {{ }} عبارت دارای ویرگول باید در گیومه باشد"),
    "twice": ("the key {name!r} is given twice", "کلید {name!r} دو بار آمده است"),
    "missing": ("{what}: {name!r} is missing", "{what}: {name!r} نیامده است"),
    "text": ("a text is expected here", "اینجا باید یک متن باشد"),
    "long_text": ("the text is longer than {most} characters", "متن بلندتر از {most} نویسه است"),
    "duration": ("a duration is expected here, such as 90s, 5m or 1h30m", "اینجا باید یک مدت باشد، مانند 90s یا 5m یا 1h30m"),
    "long_duration": ("a trading day is not that long: at most 24h", "روز معاملاتی این‌قدر بلند نیست: حداکثر 24h"),
    "one_of": ("expected is one of {known}", "باید یکی از این‌ها باشد: {known}"),
    "hours": ("hours of a day are expected here, such as 09:00-12:30", "اینجا باید ساعت‌های روز باشد، مانند 09:00-12:30"),
    "code": ("an instrument's code has 12 letters and digits, such as IRO1MADN0001",
             "کد نماد ۱۲ حرف و رقم لاتین دارد، مانند IRO1MADN0001"),
    "pattern": ("a pattern is at most 100 characters long", "الگو حداکثر ۱۰۰ نویسه دارد"),
    "names_nothing": ("the list names nothing", "این فهرست نامی ندارد"),
    "name": ("a rule's name has at most 100 characters and no slash", "نام قاعده حداکثر ۱۰۰ نویسه دارد و خط کج ندارد"),
    "name_twice": ("two rules are called {name!r}", "دو قاعده به نام {name!r} هست"),
    "no_rules": ("the file has no rules", "این فایل قاعده‌ای ندارد"),
    "let_name": ("{name!r} cannot be a name of yours: use letters, digits and _, and not the name of a column or function",
                 "{name!r} نام مجازی نیست: از حرف، رقم و _ استفاده کنید، نه نام ستون یا تابع"),
    "let_circle": ("{name!r} depends on itself", "{name!r} به خودش وابسته است"),
    "feed_match": ("a feed rule covers no instruments: it has no `match`", "قاعدهٔ feed دربارهٔ نماد نیست: match ندارد"),
    "moment": ("`when` can hold for one poll only: there is nothing to wait for",
               "شرط when فقط در یک لحظه برقرار است: for معنایی ندارد"),
    "overlap": ("`until` is true while `when` holds (compare the values of {name}): nothing begins then",
                "until هم‌زمان با when برقرار می‌شود (مقدارهای {name}): آنگاه هیچ هشداری آغاز نمی‌شود"),
    "channel": ("no channel is called {name!r}; there are {known}", "کانالی به نام {name!r} نیست؛ کانال‌ها: {known}"),
    # messages
    "brace": ("a brace without its partner; write {{{{ or }}}} for a brace", "آکولاد بدون جفت؛ برای خود آکولاد {{{{ یا }}}} بنویسید"),
    "spec": ("numbers are printed as +, , .1 f or % say, as in {{volume:,}} or {{plp:+.1f}}",
             "قالب عدد از +، ,، .1، f و % ساخته می‌شود، مانند {{volume:,}} یا {{plp:+.1f}}"),
    # tables and lists
    "unreadable": ("cannot read {name}: {why}", "فایل {name} خوانده نشد: {why}"),
    "no_columns": ("the first line names the columns: symbol, then those with numbers",
                   "سطر نخست نام ستون‌هاست: نماد، سپس ستون‌های عددی"),
    "column": ("{name!r} cannot be the name of a column: use letters, digits and _, and not the name of a column or function",
               "{name!r} نام مجازی برای ستون نیست: از حرف، رقم و _ استفاده کنید، نه نام ستون یا تابع"),
    "cells": ("the row has {given} cells, the first line {count}", "این سطر {given} خانه دارد و سطر نخست {count}"),
    "cell": ("{name!r} is not a number", "{name!r} عدد نیست"),
    "row_twice": ("{name!r} is in the table twice", "{name!r} دو بار در جدول آمده است"),
    "meant": ("; did you mean {name!r}?", "؛ آیا منظور {name!r} بود؟"),
    "nothing_matches": ("rule {rule}: no instrument is called {name!r}", "قاعدهٔ {rule}: نمادی به نام {name!r} نیست"),
}  # fmt: skip


def explain(text: str, language: str, fix: str | None = None, **values: Any) -> str:
    """Return a text with its values. Instead of what there is, it names the nearest if `fix` is it."""
    n = 1 if language == "fa" else 0
    shown = {key: KINDS[value][n] if value in KINDS and key != "name" else value for key, value in values.items()}
    whole = TEXTS[text][n]
    if "known" in values and fix is not None:
        cut = "; " if n == 0 else "؛ "
        return whole.partition(cut)[0].format(**shown) + TEXTS["meant"][n].format(name=fix)
    return whole.format(**shown)
