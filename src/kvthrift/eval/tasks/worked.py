"""Eight worked problems of grade school mathematics, written for this package: the shots of the GSM8K tasks."""

from __future__ import annotations

WORKED = (
    (
        "A baker makes 6 trays of 12 rolls each. She sells 49 rolls in the morning. How many rolls are left?",
        "She makes 6 * 12 = 72 rolls. After the morning 72 - 49 = 23 rolls are left.",
        "23",
    ),
    (
        "Lena reads 15 pages a day on weekdays and 25 pages a day at weekends. How many pages does she read "
        "in 2 weeks?",
        "A week has 5 weekdays, 5 * 15 = 75 pages, and 2 weekend days, 2 * 25 = 50 pages. That is 75 + 50 = "
        "125 pages a week, and 2 * 125 = 250 pages in 2 weeks.",
        "250",
    ),
    (
        "A jacket costs $80. It is reduced by 25%, and Omar also has a voucher for $5. What does he pay?",
        "The reduction is 80 * 25 / 100 = 20 dollars, which leaves 80 - 20 = 60 dollars. With the voucher he "
        "pays 60 - 5 = 55 dollars.",
        "55",
    ),
    (
        "Three friends share a taxi that costs $4 to start and $2 a mile. They ride 13 miles. What does each "
        "of them pay?",
        "The ride costs 4 + 2 * 13 = 30 dollars. Each of the three pays 30 / 3 = 10 dollars.",
        "10",
    ),
    (
        "A tank holds 240 litres and is one third full. A pump adds 8 litres a minute. How many minutes until "
        "it is full?",
        "There are 240 / 3 = 80 litres in the tank, so 240 - 80 = 160 litres are missing. That takes 160 / 8 "
        "= 20 minutes.",
        "20",
    ),
    (
        "Mina is 4 years older than Tom. In 6 years she will be twice as old as Tom is now. How old is Mina now?",
        "Let Tom be t years old. Mina is t + 4, and in 6 years t + 10 = 2 * t, so t = 10. Mina is 10 + 4 = 14 "
        "years old.",
        "14",
    ),
    (
        "A farmer has 18 hens. Each lays 5 eggs a week. He keeps 12 eggs and sells the rest in boxes of 6. "
        "How many boxes does he sell a week?",
        "The hens lay 18 * 5 = 90 eggs. He sells 90 - 12 = 78 eggs, which fill 78 / 6 = 13 boxes.",
        "13",
    ),
    (
        "A train leaves with 150 people. At the first stop 45 get off and 21 get on, at the second half of "
        "those on board get off. How many remain?",
        "After the first stop there are 150 - 45 + 21 = 126 people. Half of them get off, so that 126 / 2 = 63 remain.",
        "63",
    ),
)
"""Question, reasoning, answer."""
